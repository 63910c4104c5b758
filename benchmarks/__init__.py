"""Speed, and accuracy against other ways to the same end: see docs/performance.md."""
