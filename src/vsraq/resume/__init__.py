# SPDX-License-Identifier: Apache-2.0
"""Killed runs: what they leave on disk, and whether they may go on."""
