"""Plans: which rank writes and reads which bytes. Pure computations, without I/O and clock."""
