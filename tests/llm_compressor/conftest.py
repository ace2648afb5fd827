# SPDX-License-Identifier: Apache-2.0
"""The tests here run in an environment of their own: `make test-llmcompressor`."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("llmcompressor") else ["test_*.py"]
