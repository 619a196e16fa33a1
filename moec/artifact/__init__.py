"""The ``.moec`` container: writing it, looking into it without running anything, and running what it holds."""
