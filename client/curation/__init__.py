"""Which synthetic images a student learns from, which never stay in the set, and whether any may leave."""

from client.curation.consistency import Curated, agreement, drop_inconsistent, synthetic_part

__all__ = ["Curated", "agreement", "drop_inconsistent", "synthetic_part"]
