"""A plan as text for a person."""

from __future__ import annotations

from lm.tools.planning.mesh_search import Search, command_line
from lm.tools.planning.plan import Plan


def report(plan: Plan) -> str:
    """Some lines: memory, work, communication, time; 1 GB is 10⁹ bytes."""
    mesh = ", ".join(f"{axis}={size}" for axis, size in plan.mesh.items()) or "one device"
    slices = f" × {plan.n_slices} slices" if plan.n_slices > 1 else ""
    settings = ", ".join(f"{key.split('.')[1]}={value}" for key, value in plan.config.items())
    lines = [
        f"{plan.parameters:,} parameters on {plan.topology}{slices}, {plan.n_devices} devices "
        f"({mesh})",
        settings,
        "",
        *_memory(plan),
        "",
        *_work(plan),
    ]
    if plan.collectives:
        lines += ["", *_collectives(plan)]
    lines += ["", *_time(plan)]
    return "\n".join(lines)


def _memory(plan: Plan) -> list[str]:
    m = plan.memory
    left = m.capacity - m.total
    verdict = f"fits, {_gb(left)} to spare" if plan.fits else f"DOES NOT FIT, {_gb(-left)} too much"
    rows = {
        "parameters": m.parameters,
        "optimizer state": m.optimizer,
        "arguments (with the batch)": m.arguments,
        "temporaries": m.temporaries,
        "  of them gradients, if kept whole": m.gradients,
        "outputs not in place": m.outputs,
        "program": m.code,
        "total": m.total,
        "capacity": m.capacity,
        "offloaded to the host": m.host or None,
    }
    lines = [f"memory a device: {verdict}"]
    lines += [f"  {name:36}{_gb(size):>12}" for name, size in rows.items() if size is not None]
    lines += ["  largest arrays:"]
    return lines + [f"    {_gb(size):>10}  {name[:100]}" for size, name in plan.largest]


def _work(plan: Plan) -> list[str]:
    if plan.compiled_flops is None or plan.memory_traffic is None:
        return [f"work a device a step: model {plan.model_flops / 1e12:.3f} TFLOP"]
    ratio = plan.compiled_flops / plan.model_flops
    return [
        f"work a device a step: model {plan.model_flops / 1e12:.3f} TFLOP, compiled "
        f"{plan.compiled_flops / 1e12:.3f} TFLOP ({ratio:.2f}×), memory traffic "
        f"{_gb(plan.memory_traffic)}; attention kernel {plan.attention_kernel}"
    ]


def _collectives(plan: Plan) -> list[str]:
    lines = ["communication a device a step:"]
    for c in plan.collectives:
        seconds = "" if c.seconds is None else f"{1e3 * c.seconds:10.2f} ms"
        lines.append(
            f"  {c.kind:20}{c.axis:16}{c.network:5}{c.count:6} × {_gb(c.bytes / c.count):>9}"
            f"{'  asynchronous' if c.asynchronous else '              '}{seconds}"
        )
    return lines


def _time(plan: Plan) -> list[str]:
    if plan.time is None:
        return [f"compiled in {plan.compile_seconds:.0f} s; no bound on the time: no figures"]
    t = plan.time
    return [
        f"time bound {t.bound:.4f} s a step ({plan.bottleneck}): compute {t.compute:.4f}, memory "
        f"{t.memory:.4f}, network {t.network:.4f}",
        f"  at the bound {plan.tokens_per_second:,.0f} tokens/s, MFU {plan.mfu:.1%} (of bfloat16 "
        "peak, causal attention counted once); what overlaps is free, what is recomputed is not",
        f"compiled in {plan.compile_seconds:.0f} s",
    ]


def _gb(size: float) -> str:
    return f"{size / 1e9:,.3f} GB" if abs(size) >= 1e8 else f"{size / 1e6:,.3f} MB"


def search_report(found: Search) -> str:
    """What a search found as a table, the best first, and the overrides of the winner."""
    lines = [
        f"{found.considered} candidates: {found.too_large} too large, {found.not_compiled} not "
        f"compiled (--limit), {len(found.failed)} not compilable, {len(found.ranked)} fit"
    ]
    lines += [f"  {reason}" for reason in found.failed]
    if not found.ranked:
        more = "a larger --limit, " * (found.not_compiled > 0)
        lines.append(f"nothing of it fits: {more}more devices, or a smaller batch or model")
        return "\n".join(lines)
    lines += [
        "",
        f"{'mesh':48}{'remat':>13}{'parts':>7}{'memory':>12}{'bound':>11}{'MFU':>8}  bottleneck",
    ]
    for overrides, plan in found.ranked:
        mesh = ", ".join(f"{axis}={size}" for axis, size in plan.mesh.items()) or "one device"
        mesh += ", sequence" * overrides["parallel.sequence"]
        bound = f"{plan.time.bound:.4f} s" if plan.time else "-"
        mfu = "-" if plan.mfu is None else f"{plan.mfu:.1%}"
        lines.append(
            f"{mesh:48}{overrides['train.remat']:>13}{overrides['train.microbatches']:>7}"
            f"{_gb(plan.memory.total):>12}{bound:>11}{mfu:>8}  {plan.bottleneck or ''}"
        )
    return "\n".join([*lines, "", command_line(found.ranked[0][0])])
