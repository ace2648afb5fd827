# SPDX-License-Identifier: Apache-2.0
"""The tests here build and install the package: `make test-package`."""

import os

collect_ignore_glob = [] if os.environ.get("VSRAQ_TEST_PACKAGE") else ["test_*.py"]
