"""`python -m lora_booth` is `lora-booth`."""

from lora_booth.cli import main

if __name__ == "__main__":
    main()
