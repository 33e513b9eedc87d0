"""How often to save: what a run loses to saving and to failures together is least at `sqrt(2 * save * failures)`.

Source: J. W. Young, "A first order approximation to the optimum checkpoint interval", 1974. BLOOM's figures: 40 s a
save and one or two failures a week give 82 to 116 minutes; that run lost 7.3 hours once, and then saved every 3.
"""

from __future__ import annotations

import math

from ..config.values import validate_count, validate_positive


# BLOOM: 384 GPUs lost one or two a week, and wrote 2.3 TB in 40 s from 48 nodes.
DEVICE_HOURS_BETWEEN_FAILURES = 384 * 168 / 1.5
BYTES_PER_SECOND_OF_NODE = 2.3e12 / 40 / 48


def checkpoint_interval(save_seconds: float, hours_between_failures: float) -> float:
    """Seconds from one checkpoint to the next that lose least.

    Args:
        save_seconds (`float`): that the run stands still for a checkpoint.
        hours_between_failures (`float`): of the whole run, on average.

    Raises:
        ValueError: one of them is not a finite number above 0.
    """
    validate_positive("save_seconds", save_seconds, "seconds that one checkpoint takes")
    validate_positive("hours_between_failures", hours_between_failures, "hours of the whole run")
    return math.sqrt(2 * save_seconds * hours_between_failures * 3600)


def expected_hours_between_failures(num_devices: int) -> float:
    """Of a run on so many devices, by BLOOM's: 43,008 device-hours from one failure to the next."""
    validate_count("num_devices", num_devices, "devices")
    return DEVICE_HOURS_BETWEEN_FAILURES / num_devices
