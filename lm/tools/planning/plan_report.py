"""Text output of `lm plan`: a plan, or a search ranking. 1 GB is 10⁹ bytes."""

from __future__ import annotations

from lm.tools.formatting import plain_text, text_table
from lm.tools.planning.mesh_search import SearchResult, command_line
from lm.tools.planning.plan import Plan


def plan_text(plan: Plan) -> str:
    """Format a plan: memory, work, communication and time."""
    slices = f" × {plan.n_slices} slices" if plan.n_slices > 1 else ""
    settings = (
        f"{key.removesuffix('.name').rpartition('.')[2]}={value}"
        for key, value in plan.config.items()
    )
    parts = [
        f"{plan.parameters:,} parameters on {plan.topology}{slices}, {plan.n_devices} devices "
        f"({_mesh(plan)})\n{', '.join(settings)}",
        _memory(plan),
        _work(plan),
        _collectives(plan),
        _time(plan),
    ]
    return "\n\n".join(filter(None, parts))


def _mesh(plan: Plan) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in plan.mesh.items()) or "one device"


def _memory(plan: Plan) -> str:
    m = plan.memory
    left = m.capacity - m.needed
    verdict = (
        f"fits, {size_text(left)} to spare"
        if plan.fits
        else f"DOES NOT FIT, {size_text(-left)} too much"
    )
    sizes = {
        "parameters": m.parameters,
        "optimizer state": m.optimizer,
        "arguments (with the batch)": m.arguments,
        "temporaries": m.temporaries,
        "  of which gradients, if materialized": m.gradients,
        "outputs without donated memory": m.outputs,
        "program": m.code,
        "total": m.total,
        "at the peak": m.needed if m.needed != m.total else None,
        "capacity": m.capacity,
        "offloaded to the host": m.host or None,
    }
    rows = [(name, size_text(size)) for name, size in sizes.items() if size is not None]
    largest = [(size_text(size), shorten(name)) for size, name in plan.largest]
    return (
        f"memory a device: {verdict}\n{plain_text(text_table(rows, right=[1]), indent=2)}\n"
        f"  largest arrays:\n{plain_text(text_table(largest, right=[0]), indent=4)}"
    )


def shorten(name: str, width: int = 110) -> str:
    """Shorten a name in the middle if it is longer than `width`."""
    kept = (width - 1) // 2
    return name if len(name) <= width else f"{name[:kept]}…{name[-kept:]}"


def _work(plan: Plan) -> str:
    model = f"work a device a step: model {plan.model_flops / 1e12:.3f} TFLOP"
    if plan.compiled_flops is None or plan.memory_traffic is None:
        return model
    ratio = plan.compiled_flops / plan.model_flops
    return (
        f"{model}, compiled {plan.compiled_flops / 1e12:.3f} TFLOP ({ratio:.2f}×), memory traffic "
        f"{size_text(plan.memory_traffic)}; attention kernel {plan.attention_kernel}"
    )


def _collectives(plan: Plan) -> str:
    rows = [
        (
            c.kind,
            c.axis,
            c.network,
            f"{c.count} ×",
            size_text(c.bytes / c.count),
            "asynchronous" if c.asynchronous else "",
            "" if c.seconds is None else f"{1e3 * c.seconds:.2f} ms",
        )
        for c in plan.collectives
    ]
    table = plain_text(text_table(rows, right=[3, 4, 6]), indent=2)
    return f"communication a device a step:\n{table}" if rows else ""


def _time(plan: Plan) -> str:
    compiled = f"compiled in {plan.compile_seconds:.0f} s"
    if plan.time is None:
        # XLA does not compile a program that is too large.
        ran = plan.compiled_flops is not None
        reason = "the rates of the chip are unknown" if ran else "no program fits"
        return f"{compiled}; no bound on the time: {reason}"
    t = plan.time
    return (
        f"time bound {t.bound:.4f} s a step ({plan.bottleneck}): compute {t.compute:.4f}, memory "
        f"{t.memory:.4f}, network {t.network:.4f}\n"
        f"  at the bound {plan.tokens_per_second:,.0f} tokens/s, MFU {plan.mfu:.1%} (of bfloat16 "
        "peak, causal attention counted once); communication that overlaps costs no time, "
        f"recomputation does\n{compiled}"
    )


def size_text(size: float) -> str:
    """Format bytes."""
    return f"{size / 1e9:,.3f} GB" if abs(size) >= 1e8 else f"{size / 1e6:,.3f} MB"


def search_text(found: SearchResult) -> str:
    """Format a search ranking, best first, and the overrides of the best."""
    lines = [
        f"{found.considered} candidates: {found.too_large} too large, {found.not_compiled} not "
        f"compiled (--limit), {len(found.failed)} not compilable, {len(found.ranked)} fit"
    ]
    lines += [f"  {reason}" for reason in found.failed]
    if not found.ranked:
        more = "a larger --limit, " * (found.not_compiled > 0)
        lines.append(f"no candidate fits: try {more}more devices, or a smaller batch or model")
        return "\n".join(lines)
    rows = [
        (
            _mesh(plan) + ", sequence" * overrides["parallel.sequence"],
            overrides["train.remat"],
            str(overrides["train.microbatches"]),
            size_text(plan.memory.needed),
            f"{plan.time.bound:.4f} s" if plan.time else "-",
            "-" if plan.mfu is None else f"{plan.mfu:.1%}",
            plan.bottleneck or "",
        )
        for overrides, plan in found.ranked
    ]
    columns = ("mesh", "remat", "microbatches", "memory", "bound", "MFU", "bottleneck")
    table = plain_text(text_table(rows, columns, right=range(2, 6)))
    return "\n".join([*lines, "", table, "", command_line(found.ranked[0][0])])
