"""Published benchmarks, as distributed, to folder datasets: archive → scenes → labels → tiles → splits → folder."""
