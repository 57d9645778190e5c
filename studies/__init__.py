"""Research outside the package: experiments that anyone can run again."""
