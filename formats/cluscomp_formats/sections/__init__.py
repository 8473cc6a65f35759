"""Parts shared by the formats: payloads, bit streams of codes, sections, the header that describes them, and the digest."""
