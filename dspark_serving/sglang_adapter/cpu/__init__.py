"""What SGLang lacks on a machine without an accelerator; nothing here is active where there is one."""
