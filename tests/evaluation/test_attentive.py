"""Attentive probes against a plain module and torch's AdamW, and on what the mean of the tokens does not tell."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_mim.evaluation.attentive import Attentive, AttentiveProbes
from hf_mim.evaluation.features import FeatureExtractor
from hf_mim.evaluation.linear import train_heads
from hf_mim.evaluation.probe_training import mean_and_scale, train_together


class PlainProbe(nn.Module):
    """The probe as papers draw it, one alone: BatchNorm, keys and values of every token, a learned query, linear."""

    def __init__(self, probes: AttentiveProbes, number: int):
        super().__init__()
        self.query, self.key, self.value, self.weight, self.bias = (
            nn.Parameter(p[number].detach().clone())
            for p in (probes.query, probes.key, probes.value, probes.weight, probes.bias)
        )

    def forward(self, tokens):
        batch, count, width = tokens.shape
        heads, narrow, _ = self.key.shape
        x = nn.BatchNorm1d(width, eps=1e-6, affine=False)(tokens.mT).mT
        keys, values = (x @ w.reshape(width, width).T for w in (self.key, self.value))
        keys, values = (y.view(batch, count, heads, narrow).transpose(1, 2) for y in (keys, values))
        query = self.query[None, :, None].expand(batch, -1, -1, -1)
        pooled = (query @ keys.mT / math.sqrt(narrow)).softmax(dim=-1) @ values
        return F.linear(pooled.transpose(1, 2).reshape(batch, width), self.weight, self.bias)


def hidden_in_one_token(n=600, tokens=16, width=32, num_classes=4):
    """One token, anywhere, tells the class in dimensions 1 to 15 and dimension 0 marks it; the others cancel it."""
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(0, num_classes, (n,), generator=random)
    codes = torch.randn(num_classes, 15, generator=random)
    place, rows = torch.randint(0, tokens, (n,), generator=random), torch.arange(n)
    x = torch.randn(n, tokens, width, generator=random) / 2
    x[..., 0] = 0
    x[rows, place, :16] = torch.cat([torch.full((n, 1), 3.0), codes[labels]], dim=1)
    others = torch.ones(n, tokens, 1)
    others[rows, place] = 0
    return x - others * x.sum(dim=1, keepdim=True) / (tokens - 1), labels


def probes_of(x, grid, num_classes=4, heads=4):
    statistics = mean_and_scale(x, torch.arange(len(x)), "x")
    return AttentiveProbes(*statistics, grid, num_classes, heads, seed=0, device=torch.device("cpu"))


def test_each_probe_is_the_plain_one_that_torch_trains_alone():
    x, labels = hidden_in_one_token(n=24)
    x = x * 3 + 2
    grid = [(0.01, 0.0), (0.003, 20.0)]
    probes = probes_of(x, grid)
    plain = [PlainProbe(probes, number) for number in range(2)]
    standardised = probes.standardise(x)
    torch.testing.assert_close(probes.logits(standardised)[:, 0], plain[0](x), rtol=1e-4, atol=1e-5)
    assert torch.equal(*probes.logits(standardised).unbind(1)), "all start alike"
    for rate in (1.0, 0.5, 0.2):
        probes.step(x, labels, rate)
    for number, (learning_rate, weight_decay) in enumerate(grid):
        model = plain[number]
        groups = [
            {"params": [model.key, model.value, model.weight], "weight_decay": weight_decay},
            {"params": [model.query, model.bias], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups)
        for rate in (1.0, 0.5, 0.2):
            for group in optimizer.param_groups:
                group["lr"] = rate * learning_rate
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            optimizer.step()
        torch.testing.assert_close(probes.logits(standardised)[:, number], model(x), rtol=1e-3, atol=1e-4)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(getattr(probes, name)[number], parameter, rtol=1e-3, atol=1e-5)


def test_attention_finds_the_token_that_tells_the_class_where_the_mean_tells_nothing():
    x, labels = hidden_in_one_token()
    ids, test = torch.arange(500), torch.arange(500, 600)
    (linear,) = train_heads([x.mean(dim=1)], labels, ids, [[(0.1, 0.0)]], 4, epochs=20)
    assert (linear.predict(x.mean(dim=1), test)[:, 0, 0] == labels[test]).float().mean() < 0.4
    probes = probes_of(x[:500], [(0.03, 0.01), (1e-9, 0.0)])
    train_together([probes], [x], labels, ids, epochs=20, batch_size=64, seed=0, warmup=0.1)
    accuracy = (probes.predict(x, test)[..., 0] == labels[test, None]).float().mean(dim=0)
    assert accuracy[0] > 0.97 and accuracy[1] < 0.5, "each probe learns at its own rate"


def test_protocol_runs_on_an_encoder_and_repeats_itself(tiny_encoder, digits_splits, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hf_mim.progress.watched", lambda: True)
    train, test = (split.select(range(200)) for split in digits_splits)
    extract = FeatureExtractor(tiny_encoder, cache=tmp_path, progress=False)
    options = dict(epochs=20, batch_size=32, learning_rates=[0.05, 0.2], weight_decays=[0.01])
    results = []
    for number in range(2):
        torch.manual_seed(number)
        results.append(Attentive(**options).run(extract.replace(progress=number == 1), train, test))
        assert ("probes" in capsys.readouterr().err) == (number == 1), "a bar where the extractor has one"
    first, second = results
    assert (first.value, first.table, first.scores) == (second.value, second.table, second.scores)
    assert 0.3 < first.value < first.scores["top5"] and len(first.table) == 2
    assert first.settings["attention_heads"] == 8 and first.settings["features"] == "last/tokens/norm"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"features": "last/mean/norm"}, "must be tokens, such as last/tokens/norm, not last/mean/norm"),
        ({"attention_heads": 0}, "attention_heads must be at least 1"),
        ({"weight_decays": []}, "weight_decays must be numbers 0 or more"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Attentive(**options)


def test_heads_that_do_not_divide_the_width_are_refused_before_any_work(tiny_encoder, digits_splits):
    with pytest.raises(ValueError, match="must divide the width 32 of last/tokens/norm, not 5"):
        Attentive(attention_heads=5).run(FeatureExtractor(tiny_encoder), *digits_splits)
