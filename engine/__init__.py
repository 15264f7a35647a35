"""One model replica: the contract that workers drive, the block pool, and the engines."""
