"""Inputs of the ops between rollout and update, as :mod:`siirl_kernels.cases`.

Shapes: N responses, T their tokens, packed one response after another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from siirl_kernels.cases import Generated, Level, Source


def group_advantages(level: Level, source: Source) -> Iterator[Generated]:
    def case(
        name: str, reward: Tensor, ids: Tensor, norm_std: bool = True, valid: Tensor | None = None, size: float = 1.0
    ) -> Generated:
        valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
        arguments = {"reward_N": reward, "group_id_N": ids, "valid_N": valid, "norm_std": norm_std, "eps": 1e-6}
        return name, arguments, size

    def in_groups(count: int, each: int) -> Tensor:
        return torch.arange(count, device=source.device).repeat_interleave(each)

    if level == "perf":
        yield case("512 groups of 16", source.normal(8192), in_groups(512, 16))
        return
    yield case("5 groups of 4", source.normal(20), in_groups(5, 4))
    yield case("without the deviation", source.normal(12), in_groups(3, 4), norm_std=False)
    yield case("one row", source.normal(1), in_groups(1, 1))
    yield case("no row", source.normal(0), in_groups(0, 4))
    shuffled = in_groups(7, 5)[source.permutation(35).to(source.device)]
    yield case("ragged, some failed", source.normal(31), shuffled[:31], valid=source.integers(4, 31) > 0)
    if level == "full":
        yield case("equal rewards", torch.full_like(source.normal(12), 0.1), in_groups(3, 4))
        yield case("strided", source.every_other(24), in_groups(6, 4))
        yield case("none valid", source.normal(8), in_groups(2, 4), valid=in_groups(2, 4) < 0)
        failed = torch.where(in_groups(8, 2) % 2 == 0, torch.nan, source.normal(16))
        yield case("failed ones are no number", failed, in_groups(2, 8), valid=failed.isfinite())
        yield case("0 or 1", source.integers(2, 64).to(source.dtype), in_groups(8, 8))
        yield case("large", source.normal(40, scale=1e4), in_groups(5, 8), norm_std=False, size=1e4)
        yield case("large numbers as ids", source.normal(40), in_groups(5, 8) * (2**40 + 7))


def gae(level: Level, source: Source) -> Iterator[Generated]:
    def case(
        name: str, lengths: Sequence[int], gamma: float = 0.99, lam: float = 0.95, size: float | None = None
    ) -> Generated:
        """Sums of as many terms as γλ lets count, so the size is that."""
        draw = source.every_other if name == "strided" else source.normal
        offsets = torch.tensor([0, *lengths]).cumsum(0).to(source.device)
        rewards, values = draw(sum(lengths)), draw(sum(lengths))
        arguments = {"token_rewards_T": rewards, "values_T": values, "offsets": offsets, "gamma": gamma, "lam": lam}
        horizon = min(max(lengths, default=1), 1 / max(1e-3, 1 - gamma * lam))
        return name, arguments, float(max(1.0, horizon)) if size is None else size

    if level == "perf":
        yield case("256 ragged of up to 1024", (1 + 1023 * torch.rand(256, generator=_fixed())).long().tolist())
        return
    yield case("ragged", (5, 1, 9, 3, 9))
    yield case("empty responses", (0, 4, 0, 0, 7, 0))
    yield case("one token", (1,))
    yield case("no response", ())
    yield case("strided", (3, 8, 2))
    if level == "full":
        yield case("nothing discounted", (40, 3, 17), gamma=1.0, lam=1.0)
        yield case("temporal differences", (12, 5), lam=0.0)
        yield case("one long", (700,))
        yield case("all empty", (0, 0))
        yield case("many of one token", (1,) * 67)


def take_response(arguments: dict[str, Any], row: int) -> tuple[dict[str, Any], slice] | None:
    """The arguments of one response alone, and where its tokens are."""
    offsets = arguments["offsets"]
    if row + 1 >= len(offsets):
        return None
    part = slice(int(offsets[row]), int(offsets[row + 1]))
    alone = {name: arguments[name][part] for name in ("token_rewards_T", "values_T")}
    return alone | {"offsets": offsets[row : row + 2] - offsets[row]}, part


def policy_loss(level: Level, source: Source) -> Iterator[Generated]:
    def case(
        name: str,
        new: Tensor,
        old: Tensor,
        advantages: Tensor,
        clip: tuple[float, float] = (0.2, 0.28),
        dual: float | None = None,
        size: float = 1.0,
    ) -> Generated:
        """Where rounding decides on which side of a bound a ratio is, the ratio becomes 1."""
        ratio, wide = (new.double() - old.double()).exp(), 2**-6 if source.dtype != torch.float32 else 1e-4
        near = torch.zeros_like(ratio, dtype=torch.bool)
        for bound in (1 - clip[0], 1 + clip[1], *(() if dual is None else (dual,))):
            near |= (ratio - bound).abs() < wide
        old = torch.where(near, new, old)
        named = {"log_probs_T": new, "old_log_probs_T": old, "advantages_T": advantages}
        return name, named | {"clip_low": clip[0], "clip_high": clip[1], "dual_clip": dual}, size

    def drawn(count: int, spread: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
        old = source.normal(count, mean=-1.5)
        return old + source.normal(count, scale=spread), old, source.normal(count)

    if level == "perf":
        tokens = source.real(65_536)
        yield case(f"{tokens} tokens", *drawn(tokens))
        yield case(f"{tokens} tokens, dual clip", *drawn(tokens), dual=3.0)
        return
    yield case("101 tokens", *drawn(101))
    yield case("dual clip", *drawn(67, spread=1.0), dual=1.5)
    yield case("one token", *drawn(1))
    yield case("no token", *drawn(0))
    new, old, advantages = (source.every_other(33) for _ in range(3))
    yield case("strided", new, old, advantages, size=8.0)
    if level == "full":
        new, old, advantages = (x[1:] for x in drawn(130))
        yield case("misaligned", new, old, advantages)
        new, _, advantages = drawn(64)
        yield case("on-policy", new, new.clone(), advantages)
        yield case("on-policy, no room", new, new.clone(), advantages, clip=(0.0, 0.0), dual=2.0)
        yield case("no advantage", new, new + 0.5, torch.zeros_like(new))
        apart = torch.where(source.integers(2, 64) > 0, 60.0, -60.0).to(source.dtype)
        yield case("ratios beyond all bounds", new, new + apart, advantages, size=2.0**29)
        yield case("large advantages", new, new + 0.0625, 1e3 * advantages, size=1e3)


def _fixed() -> torch.Generator:
    return torch.Generator().manual_seed(11)
