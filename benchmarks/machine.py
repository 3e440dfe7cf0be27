"""What a comparison's numbers were taken on."""

from __future__ import annotations

import os
import platform
from typing import Any

from siirl.device.host import cpu_name


def machine() -> dict[str, Any]:
    """CPU and Python, one thread a process; the load average is that of the end."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": 1,
        "python": platform.python_version(),
        "load_average": os.getloadavg(),
    }
