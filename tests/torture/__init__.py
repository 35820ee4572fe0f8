"""``python -m tests.torture``: kills, flipped bits, cut transfers and full disks, many times; counts what was lost."""
