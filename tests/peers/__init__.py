"""Independent transcriptions of other people's code, which the tests compare the library with."""
