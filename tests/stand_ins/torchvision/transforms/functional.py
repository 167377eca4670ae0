"""Functions on images."""


def crop(image, top, left, height, width):
    return image[..., top : top + height, left : left + width]
