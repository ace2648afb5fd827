# SPDX-License-Identifier: Apache-2.0
"""Router-aligned quantization of mixture-of-experts models, as an AutoRound plug-in."""
