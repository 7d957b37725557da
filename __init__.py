"""trailmed: measure, remove and verify over-refusal of on-device language models."""

__version__ = "0.1.0"
