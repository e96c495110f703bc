"""Prints the system metrics, an empty line, and the memory of the processes named on stdin."""

from __future__ import annotations

import argparse
import sys

from ts.metrics import process_memory_metric, system_metrics


def main() -> None:
    """Entry of `ts/metrics/metric_collector.py --gpu N`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", type=int, default=0, help="how many GPUs to measure")
    options = parser.parse_args()
    system_metrics.collect_all(num_of_gpu=options.gpu)
    print()
    process_memory_metric.check_process_mem_usage(sys.stdin)


if __name__ == "__main__":
    main()
