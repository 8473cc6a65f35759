"""The parts of which packed files and deltas consist: sections, headers, payloads."""
