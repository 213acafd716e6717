"""Pure torch modules with the checkpoint's own parameter names. No files, no arguments, no devices chosen."""
