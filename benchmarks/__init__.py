"""How fast and how good an artifact is: latency, memory, reports."""
