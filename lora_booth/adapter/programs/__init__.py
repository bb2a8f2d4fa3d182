"""What programs make of an adapter file. Nothing here reads or writes one."""
