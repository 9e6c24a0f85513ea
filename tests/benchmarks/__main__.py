"""`make bench`: the figures of RESULTS.md, as ratios within this run, against what is needed. Exit code 1 if one is missed.

Run it on a quiet machine. Each benchmark runs in a process of its own: threads and allocators of one do not change another.
"""

from __future__ import annotations

import json
import subprocess
import sys

NEEDED = {
    "bench_engine": {"generation_ratio": ">= 0.85", "scoring_ratio": ">= 0.85", "kept_scoring_ratio": ">= 0.85"},
    "bench_labels": {"ratio": ">= 20", "tokens_per_second": ">= 20e6"},
    "bench_shards": {"tokens_per_second": ">= 3e6"},
    "bench_status": {"cpu_ratio": "<= 1.2"},
    "bench_report": {"megabytes": "<= 20", "seconds_to_open": "<= 2"},
    "bench_sweep": {"tokens_per_second": ">= 0.2e6"},
    "bench_step": {
        "memory_ratio": "<= 0.35",
        "speed_ratio": ">= 1.0",
        "topk_memory_ratio": "<= 1.15",
        "topk_time_ratio": "<= 1.3",
    },
    "bench_parquet": {"parquet_share": ">= 0.25"},
    "bench_packing": {"word_problems_speedup": ">= 1.2", "long_prompts_speedup": ">= 1.6", "alone_padded_packed": "<= 0.05"},
    "bench_shared_prompt": {"first": ">= 2", "scoring": ">= 1.5"},
    "bench_silent": {"compared": ">= 1.3", "later": ">= 2.5"},
    "bench_stored": {"memory_ratio": "<= 0.1"},
    "bench_round": {"overhead_share": "<= 0.35"},
    "bench_overlap": {"speedup_share": ">= 0.85"},
    "bench_inflight": {"speedup": ">= 1.5"},
    "bench_control_plane": {
        "efficiency_16_engines": ">= 0.9",
        "driver_growth_mb": "<= 20",
        "summary_speedup": ">= 2",
        "dispatcher_batches_1000": ">= 20000",
    },
}


def main(names: list[str]) -> int:
    """Run the named benchmarks, or all; returns the exit code."""
    missed = 0
    for module in names or list(NEEDED):
        code = f"import json; from tests.benchmarks.{module} import measure; print(json.dumps(measure()))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{module}: failed\n{done.stderr[-2000:]}")
            missed += 1
            continue
        print(module)
        for name, value in json.loads(done.stdout.splitlines()[-1]).items():
            need = NEEDED[module].get(name)
            held = need is None or _holds(value, need)
            missed += not held
            print(f"  {name:<30} {value:>16,.3f}  {need or '':<10} {'' if need is None else 'ok' if held else 'MISSED'}")
    return int(missed > 0)


def _holds(value: float, need: str) -> bool:
    sign, bound = need.split()
    return value >= float(bound) if sign == ">=" else value <= float(bound)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
