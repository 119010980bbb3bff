"""The numbers of a plan as text."""

GIB, MIB = 2**30, 2**20


def table(plan: dict) -> str:
    """The plan in blocks, with DDP and FSDP2 in two columns where they differ."""
    cluster, batch, step, run, loading = (plan[name] for name in ("cluster", "batch", "step", "run", "loading"))
    parameters, memory, time = step["parameters"], plan["memory"], plan["time"]
    flops = step["forward_flops"] + step["backward_flops"]
    precision = "bfloat16 autocast, float32 weights" if plan["bf16"] else "float32"
    inside, between = cluster["link_gbps"]
    lines = [
        f"{plan['method']}, width {plan['width']}, depth {plan['depth']}, {precision}, {cluster['devices']} devices",
        "Computed, not measured. Assumed: "
        f"{cluster['tflops']:g} TFLOP/s peak, {cluster['mfu']:.0%} of it reached; {inside:g} Gbit/s in a node of "
        f"{cluster['devices_per_node']}, {between:g} between nodes.",
        "",
        f"parameters     {parameters['trained'] / 1e6:,.1f} M trained, {parameters['target'] / 1e6:,.1f} M EMA target, "
        f"{parameters['buffers'] / 1e6:,.2f} M in tables",
        f"batch          {batch['images']:,} images = {batch['per_device']} x {batch['accumulation']} accumulated x "
        f"{cluster['devices']} devices; learning rate {batch['learning_rate']:.3g}",
        f"activations    {step['ddp']['per_image'] / MIB:,.1f} MiB per image (FSDP2 "
        f"{step['fsdp']['per_image'] / MIB:,.1f}); an encoder layer keeps {step['ddp']['per_token_and_layer']:,.0f} "
        f"bytes (FSDP2 {step['fsdp']['per_token_and_layer']:,.0f}) for each of {step['encoder_tokens']} tokens",
        f"computing      {flops / 1e9:,.1f} GFLOP per image, in the backward pass {step['backward_flops'] / 1e9:,.1f}",
    ]
    rows = [
        (name, [memory[way].get(name, 0) / GIB for way in memory], ".2f")
        for name in ("weights", "target", "gradients", "gradient buckets", "AdamW", "gathered", "activations", "total")
    ]
    rows.append((f"of {cluster['memory_gib']:g} GiB", [row / cluster["memory_gib"] for row in rows[-1][1]], ".0%"))
    lines += block("memory, GiB", rows)
    rows = [
        ("sent per device, MB", [sum(sent.values()) / 1e6 for sent in plan["traffic"].values()], ",.0f"),
        ("sending, ms", [1e3 * t["sending"] for t in time.values()], ",.1f"),
        ("of it not hidden, ms", [1e3 * t["not_hidden"] for t in time.values()], ",.1f"),
        ("computing, ms", [1e3 * t["computing"] for t in time.values()], ",.1f"),
        ("step, ms", [1e3 * t["step"] for t in time.values()], ",.1f"),
        ("images/s", [t["images_per_second"] for t in time.values()], ",.0f"),
        ("hours of the run", list(run["hours"].values()), ",.1f"),
    ]
    lines += block("an optimizer step", rows)
    return "\n".join(
        [
            *lines,
            "",
            f"the run        {run['steps']:,} steps, {run['images']:,} images",
            f"loading        {loading['images_per_second']:,.0f} images/s per device: {loading['workers']} workers at "
            f"{cluster['loader_images_per_second']:,.0f} images/s each",
        ]
    )


def block(title: str, rows: list[tuple[str, list[float], str]]) -> list[str]:
    """A title, and rows of a name with one value for DDP and one for FSDP2."""
    lines = ["", f"{title:<24}{'DDP':>12}{'FSDP2':>12}"]
    return lines + [f"  {name:<22}" + "".join(f"{value:>12{form}}" for value in values) for name, values, form in rows]
