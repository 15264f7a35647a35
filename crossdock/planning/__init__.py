"""How many workers of which kind a load needs: a first guess by arithmetic, checked and improved by
simulation."""
