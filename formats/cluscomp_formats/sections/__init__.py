"""What the formats share: payloads in their order, codes as bits, sections and the header that describes them, the digest."""
