"""One model replica: the contract that workers drive, and the engines."""
