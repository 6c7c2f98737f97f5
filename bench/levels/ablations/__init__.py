"""Our own choices, one by one."""
