"""One hospital: the courier, the guard, and everything that happens inside its walls."""
