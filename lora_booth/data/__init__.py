"""The user's pictures: found, decoded, cropped, captioned and shown. No modules of torch."""
