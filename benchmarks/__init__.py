"""Where the figures in the README come from; each program prints its limit beside what it measures."""
