"""The optimal loss of images against posteriors level by level, in milliseconds a draw.

Outside the default run, which ignores this folder: `pytest -o addopts= -s tests/benchmarks/test_optimal_speed.py`. The
table of examples/results/optimal-loss: `python tests/benchmarks/test_optimal_speed.py --full FOLDER` (minutes). All in
one process on one thread, in turn, each the best of three, warm.

A draw of ours is a pair ±eps and one pass over the points for all levels; one of the others is one eps, and two matrix
products for each level.
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import torch

from snrweights.optimal.draws import pair_sums
from snrweights.optimal.exact import INT8, fastest
from snrweights.optimal.pairs import dense_sums
from snrweights.optimal.reference import ReferenceSet
from snrweights.optimal.work import Work
from snrweights.seeds import generator

BLOCK = 256  # draws of a baseline at a time, which makes naive twice as fast as 64, naive compiled by a quarter
ROUNDS = 3
OURS = ("float32", "float32 compiled", "uint8", "uint8 compiled")
BASELINES = ("naive", "naive compiled")
SIZES, DIMS, LEVELS = (10_000, 25_000, 50_000), (192, 768, 3072), (5, 20, 40)
MAIN = (50_000, 3072, 20)
LEAST = {"float32": 4.0, "float32 compiled": 4.5, "uint8": 3.0}  # times as fast as the compiled baseline, small size


def images(count, dim, seed=0):
    """Return pixels (N, D), uint8: 64 directions that images share, and grain of 10 of 255 steps."""
    stream = generator(seed)
    shared = torch.randn(64, dim, generator=stream) * 5
    parts = []
    for size in [min(1024, count - start) for start in range(0, count, 1024)]:
        rows = torch.randn(size, 64, generator=stream) @ shared + 10 * torch.randn(size, dim, generator=stream)
        parts.append((rows + 128).round().clamp(0, 255).to(torch.uint8))
    return torch.cat(parts)


def sigmas(levels):
    """Return EDM's range of noise, .002 to 80."""
    return torch.logspace(torch.tensor(0.002).log10(), torch.tensor(80.0).log10(), levels, dtype=torch.float64)


def by_distance(noisy, x, squares, sigma):
    """Posterior (M, N) of points x, as it is written down."""
    return torch.softmax(-torch.cdist(noisy, x).square() / (2 * sigma**2), 1)


@torch.compile(dynamic=True)
def fused(products, squares, inverse):
    return torch.softmax((products - squares / 2) * inverse, 1)


def by_product(noisy, x, squares, sigma):
    """The same by one matrix product, the rest in one compiled kernel; ||noisy||² cancels."""
    return fused(noisy @ x.T, squares, sigma**-2)


def naive(posterior, x, squares, sources, noise, levels):
    """Return A - ||E[x0 | x]||² (L, M), the estimator AB, of centred points x."""
    values = torch.empty(len(levels), len(noise))
    for level, sigma in enumerate(levels.float()):
        for start in range(0, len(noise), BLOCK):
            noisy = x[sources[start : start + BLOCK]] + sigma * noise[start : start + BLOCK]
            mean = posterior(noisy, x, squares, sigma) @ x
            values[level, start : start + BLOCK] = squares.mean() - mean.square().sum(1)
    return values


COMPILED = torch.compile(dense_sums, dynamic=True)


class Problem:
    """Images, draws from them, and each way to compute from these what the posteriors say at every level."""

    def __init__(self, count, dim, draws):
        pixels = images(count, dim)
        self.x = pixels / 127.5 - 1
        self.x -= self.x.mean(0)
        points = {"float32": self.x, "uint8": pixels}
        self.references = {kind: ReferenceSet(data, None, False, "cpu", 1024) for kind, data in points.items()}
        self.squares = self.x.square().sum(1)
        self.sources = torch.randint(count, (draws,), generator=generator(1)).sort().values
        self.noise = torch.randn(draws, dim, generator=generator(2))
        self.axes = self.references["uint8"].near_principal_axes(64, 0)

    def values(self, way, levels, draws):
        """Return what a way makes of some draws (L, M), levels in its own order."""
        sources, noise = self.sources[:draws], self.noise[:draws]
        if way in BASELINES:
            posterior = by_product if way == "naive compiled" else by_distance
            return naive(posterior, self.x, self.squares, sources, noise, levels)
        kind, compiled = way.split()[0], way.endswith("compiled")
        inv = levels.flip(0).reciprocal()
        dense = COMPILED if compiled else dense_sums
        return pair_sums(self.references[kind], sources, noise, inv, self.axes, Work(None, {}), dense)[0].values()

    def milliseconds(self, ways):
        """Return ms per draw {name: best of the rounds} of ways {name: (way, levels, draws)}, taken in turn."""
        best = dict.fromkeys(ways, float("inf"))
        for round_ in range(ROUNDS + 1):
            for name, (way, levels, draws) in ways.items():
                start = time.perf_counter()
                self.values(way, levels, draws if round_ else min(draws, BLOCK))
                if round_:  # the first is the warm-up
                    best[name] = min(best[name], 1e3 * (time.perf_counter() - start) / draws)
        return best


def test_one_pass_for_all_levels_is_many_times_as_fast():
    torch.set_num_threads(1)
    problem, levels = Problem(8192, 768, 256), sigmas(20)
    high = levels[-5:]
    first, second = (problem.values(way, high, 256) for way in BASELINES)
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-2)
    for way in OURS:
        ours = problem.values(way, high, 256).flip(0)
        error = (first.var(1) / 256 + ours.var(1) / 256).sqrt()
        assert ((first.mean(1) - ours.mean(1)).abs() < 5 * error).all()
    ways = {way: (way, levels, 256) for way in OURS} | {way: (way, levels, BLOCK) for way in BASELINES}
    found = problem.milliseconds(ways)
    ratio = {way: found["naive compiled"] / found[way] for way in OURS}
    for way, value in found.items():
        print(f"\n{way}: {value:.2f} ms a draw" + (f", {ratio[way]:.1f} times as fast" if way in ratio else ""), end="")
    assert not [way for way, least in LEAST.items() if ratio[way] < least]


def measured(count, dim, every):
    """Return {levels: {way: ms a draw}} at one size, and the checks that the baselines are linear, at the main one.

    The baselines take every level alike, so that five levels are timed, and multiplied.
    """
    problem = Problem(count, dim, 512)
    ways = {(way, 5): (way, sigmas(5), BLOCK) for way in BASELINES}
    for levels in every:
        draws = 512 if (count, dim, levels) == MAIN else 256
        ways |= {(way, levels): (way, sigmas(levels), draws) for way in OURS}
    linear = {}
    if (count, dim) == MAIN[:2]:
        linear = {("naive compiled", 10, BLOCK): ("naive compiled", sigmas(10), BLOCK)}
        linear |= {("naive compiled", 5, 2 * BLOCK): ("naive compiled", sigmas(5), 2 * BLOCK)}
    found = problem.milliseconds(ways | linear)
    table = {
        levels: {way: found[way, levels] for way in OURS} | {way: found[way, 5] * levels / 5 for way in BASELINES}
        for levels in every
    }
    return table, {f"{way}, {levels} levels, {draws} draws": found[way, levels, draws] for way, levels, draws in linear}


def machine():
    """Return what the table was measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name, flags = (
        next(line.split(": ")[1] for line in lines if line.startswith(key)) for key in ("model name", "flags")
    )
    return {
        "cpu": name,
        "vnni": any("vnni" in flag for flag in flags.split()),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "uint8 arithmetic": "torch._int_mm" if fastest("cpu") is INT8 else "float32 in blocks of 1024 columns",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def markdown(result):
    """Return the table, ms a draw, with how many times as fast as each baseline in brackets."""
    lines = [
        "| N | D | levels | naive | naive compiled | " + " | ".join(OURS) + " |",
        "| ---: " * (5 + len(OURS)) + "|",
    ]
    for row in result["rows"]:
        ms = row["ms"]
        ours = [f"{ms[way]:.2f} ({ms['naive'] / ms[way]:.1f}x, {ms['naive compiled'] / ms[way]:.1f}x)" for way in OURS]
        cells = [f"{row['n']:,}", row["d"], row["levels"], *(f"{ms[way]:.1f}" for way in BASELINES), *ours]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main():
    """Print the table, and write it into a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", type=Path, metavar="FOLDER", required=True, help="where speed.md and speed.json go")
    for name, every in (("sizes", SIZES), ("dims", DIMS), ("levels", LEVELS)):
        parser.add_argument(f"--{name}", type=int, nargs="+", default=every, help="of %(default)s")
    given = parser.parse_args()
    folder = given.full
    torch.set_num_threads(1)
    result = {"machine": machine(), "rows": [], "linear": {}}
    for dim in given.dims:
        for count in given.sizes:
            table, linear = measured(count, dim, given.levels)
            result["rows"] += [{"n": count, "d": dim, "levels": levels, "ms": ms} for levels, ms in table.items()]
            result["linear"] |= linear
            print(f"N = {count}, D = {dim}: done", file=sys.stderr, flush=True)
    facts = "\n".join(f"- {name}: {value}" for name, value in result["machine"].items())
    checks = "\n".join(f"- {name}: {value:.1f} ms a draw" for name, value in result["linear"].items())
    five = result["rows"][-1]["ms"]["naive compiled"] * 5 / result["rows"][-1]["levels"]
    text = TEXT.format(command=" ".join(sys.argv), facts=facts, checks=checks, five=five, table=markdown(result))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "speed.md").write_text(text)
    (folder / "speed.json").write_text(json.dumps(result, indent=1) + "\n")
    print(text)


TEXT = """# Milliseconds a draw of the optimal loss

Made by

    OMP_NUM_THREADS=1 python {command}

in one process, in turn, each the best of three, warm. Levels are spaced evenly in ln sigma over .002 to 80; synthetic
images.

{facts}

A draw of ours is a pair ±eps and one pass for all levels, with the reading of the data and the axes of the control
variates; 256 draws at a time, 512 at the size N = 50,000, D = 3072, 20 levels. A draw of the baselines is one eps, 256
at a time: `naive` is `torch.cdist`, softmax and W @ X for each level; `naive compiled` has the distances from one
matrix product and the rest in one kernel of `torch.compile`. In brackets: how many times as fast as `naive`, and as
`naive compiled`. The baselines are timed at five levels and multiplied; in the last row they are linear in levels and
draws, five levels taking {five:.1f} ms:

{checks}

Not in the table, once for a curve: one reading of the data for their mean and fingerprint; and where levels are too
clean for the draws, the N² D / 2 multiplications of the bound, and the importance sampling. CUDA: not run.

{table}
"""

if __name__ == "__main__":
    main()
