"""What soundfile raises of a file that is no sound, or cannot be opened."""

import soundfile

# Of a name that ends in .raw it wants to be told the rate, by a TypeError; one with a null character is a ValueError.
NO_SOUND = (soundfile.SoundFileError, OSError, TypeError, ValueError)
