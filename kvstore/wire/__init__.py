# SPDX-License-Identifier: Apache-2.0
"""What bytes look like outside the process: the frame around a stored part."""
