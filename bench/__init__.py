"""Benchmarks. Raw results, one JSON per machine and date, are under bench/results."""
