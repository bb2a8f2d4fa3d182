"""The doors: commands, console, demo. Nothing here knows how anything works."""
