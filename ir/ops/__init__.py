"""The built-in ops, one file each. Importing any of them registers it; ``moec.ir.opdef`` finds them all."""
