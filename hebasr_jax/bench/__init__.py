"""Speed, measured on the product's own functions with random weights; see docs/performance.md."""
