"""`hf-mim benchmark evaluate`: k-NN and linear heads, timed beside plain ways to do the same."""

import multiprocessing
import sys
import time
from dataclasses import dataclass

from hf_mim.checks import least


@dataclass
class Benchmark:
    """Seconds and memory of k-NN and of linear heads, against plain ways.

    k-NN is compared with scikit-learn's brute force, linear heads in one pass with one by one. The features are random:
    a cluster around a centre for each class. Speed does not depend on what they mean.

    Args:
        train: training images
        test: test images
        width: dimensions of a feature
        classes: number of classes
        k: neighbours that vote
        heads: linear heads that are trained together and one by one
        epochs: epochs of the linear heads
        threads: threads of each way
        repeats: rounds of k-NN; the fastest counts
    """

    train: int = 50_000
    test: int = 10_000
    width: int = 384
    classes: int = 10
    k: int = 20
    heads: int = 24
    epochs: int = 2
    threads: int = 2
    repeats: int = 3

    def __post_init__(self):
        least(1, **vars(self))

    def __call__(self) -> dict:
        import torch
        from threadpoolctl import threadpool_limits

        memory = knn_memory(self)  # first, while this process is small
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            with threadpool_limits(self.threads):
                return {"knn": benchmark_knn(self) | memory, "linear": benchmark_heads(self)}
        finally:
            torch.set_num_threads(before)


def clusters(count: int, width: int, classes: int, seed: int):
    """Features `[count, width]` and labels `[count]`. The centres are the same for every seed."""
    import torch

    centers = torch.randn(classes, width, generator=torch.Generator().manual_seed(0))
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=random)
    return torch.randn(count, width, generator=random).mul_(3).add_(centers[labels]), labels


def knn_data(args):
    return *clusters(args.train, args.width, args.classes, 1), clusters(args.test, args.width, args.classes, 2)[0]


def knn_memory(args) -> dict:
    """Peak memory of our k-NN in MiB, without the features and the libraries, measured in a process of its own.

    The process comes from a fork server, because a process that is started directly inherits the peak of its parent.
    """
    context = multiprocessing.get_context("forkserver")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=measure_knn_memory, args=(args, send))
    process.start()
    send.close()
    peak = receive.recv()
    process.join()
    return peak


def measure_knn_memory(args, pipe):
    import resource  # not on Windows

    import torch

    from hf_mim.evaluation.knn import knn_predict

    torch.set_num_threads(args.threads)
    data = knn_data(args)
    knn_predict(data[0][:1000], data[1][:1000], data[2][:10], k=args.k)  # libraries take memory at their first use
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    knn_predict(*data, k=args.k)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    pipe.send({"peak_mb": (after - before) / unit, "process_peak_mb": after / unit})


def benchmark_knn(args) -> dict:
    """Time our k-NN and two exact ways of scikit-learn, in turns. All weigh the votes in the same way.

    scikit-learn takes cosine distances, or Euclidean distances of unit vectors. Both give the same order, and the
    second is faster.
    """
    import numpy as np
    import torch
    import torch.nn.functional as F
    from sklearn.neighbors import KNeighborsClassifier

    from hf_mim.evaluation.knn import knn_predict

    x, labels, queries = knn_data(args)

    def scikit_learn(metric, normalize, weights):
        classifier = KNeighborsClassifier(
            args.k, weights=weights, algorithm="brute", metric=metric, n_jobs=args.threads
        )
        train, test = (F.normalize(y, dim=1) if normalize else y for y in (x, queries))
        return torch.from_numpy(classifier.fit(train.numpy(), labels.numpy()).predict(test.numpy()))

    ways = {
        "ours": lambda: knn_predict(x, labels, queries, k=args.k),
        "scikit-learn, cosine": lambda: scikit_learn("cosine", False, lambda d: np.exp(-d / 0.07)),
        "scikit-learn, unit vectors": lambda: scikit_learn("euclidean", True, lambda d: np.exp(-(d**2) / 2 / 0.07)),
    }
    rounds, predictions = {name: [] for name in ways}, {}
    for _ in range(args.repeats):
        for name, predict in ways.items():
            start = time.perf_counter()
            predictions[name] = predict()
            rounds[name].append(time.perf_counter() - start)
    seconds = {name: min(values) for name, values in rounds.items()}
    print(f"k-NN, {args.test} x {args.train} x {args.width}, k {args.k}, {args.threads} threads\n")
    print(f"{'way':<30}{'seconds':>10}{'ours is':>10}{'equal':>10}")
    equal = {name: (found == predictions["ours"]).double().mean().item() for name, found in predictions.items()}
    for name, value in seconds.items():
        print(f"{name:<30}{value:>10.2f}{value / seconds['ours']:>9.2f}x{equal[name]:>10.2%}")
    return {"seconds": seconds, "seconds_of_rounds": rounds, "equal_predictions": equal}


def benchmark_heads(args) -> dict:
    """Train all heads in one call, then each in a call of its own, on the same features in memory."""
    import torch

    from hf_mim.evaluation.linear import train_heads

    x, labels = clusters(args.train, args.width, args.classes, 1)
    ids = torch.arange(len(x))
    rates = torch.logspace(-3, 0, -(-args.heads // 2)).tolist()
    grid = [(rate, decay) for rate in rates for decay in (0.0, 1e-3)][: args.heads]

    def seconds(grid):
        start = time.perf_counter()
        train_heads([x], labels, ids, [grid], args.classes, epochs=args.epochs)
        return time.perf_counter() - start

    seconds(grid[:1])  # sets up memory and threads
    together, each = seconds(grid), [seconds([head]) for head in grid]
    alone = sum(each)
    print(f"\n{len(grid)} linear heads, {args.train} x {args.width}, {args.classes} classes, {args.epochs} epochs\n")
    print(
        f"{'together':<12}{together:>8.2f} s\n{'one by one':<12}{alone:>8.2f} s\n{'ratio':<12}{together / alone:>8.3f}"
    )
    result = {"heads": len(grid), "seconds_together": together, "seconds_alone": alone, "seconds_of_each": each}
    return result | {"ratio": together / alone}
