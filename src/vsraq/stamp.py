# SPDX-License-Identifier: Apache-2.0
"""When something was made, and with which versions."""

from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version


def now() -> str:
    """The time, UTC, such as "2026-01-01T00:00:00Z"."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def versions(*packages: str) -> dict[str, str]:
    """The versions of some packages, by name."""
    return {name: version(name) for name in packages}


def version_or_none(package: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
