# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: what reusing KV buys, measured on a real model and real tiers.

``python -m bench`` lists them; each lives in a module of its own. Nothing outside
this package and the tests imports it.
"""
