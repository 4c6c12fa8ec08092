"""`python -m shoestring` is the command `shoestring`."""

from shoestring.cli import main

if __name__ == "__main__":
    main()
