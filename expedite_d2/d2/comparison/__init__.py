"""Baseline and expedited side by side: accuracy, cost, latency, memory, as files and pictures."""
