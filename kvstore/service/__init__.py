# SPDX-License-Identifier: Apache-2.0
"""The sidecar: a server that owns the store of a host, its clients, and its command line."""
