"""The shapes that images are cropped to, and what that costs them.

    shapes = shapes_for(sizes, settings, least=64)                     # [(24, 24), (20, 28), …]
"""

from minwurst.base.console import say
from minwurst.edge.decoders import PIXELS, FullDecoder
from minwurst.step.buckets import STRIDE, choose_shapes, cropped, nearest_shapes


def shapes_for(sizes, settings, least):
    """The shapes of --aspect_buckets, which are reported, or the square alone.

    sizes: (width, height) of the images to train on. least: images that a shape needs.
    """
    side, most = settings.resolution // STRIDE, settings.aspect_buckets
    lost = cropped(sizes, [(side, side)])[:, 0]
    if most is None:
        if many := int((lost > 0.2).sum()):
            say(
                f"{many} of {len(lost)} images lose more than a fifth to the square crop: see "
                "data.png in the output folder, and --aspect_buckets"
            )
        return [(side, side)]
    square = lost.mean()
    shapes = choose_shapes(sizes, side, most, least)
    if len(shapes) < most:
        reason = "more would crop no less"
        if len(choose_shapes(sizes, side, most, least=1)) > len(shapes):
            reason = f"others would have fewer images than a step's {least} (--train_batch_size)"
        say(f"--aspect_buckets: {len(shapes)} of {most} shapes; {reason}")
    lost, nearest = cropped(sizes, shapes), nearest_shapes(sizes, shapes)
    for number, (height, width) in enumerate(shapes):
        of_shape = lost[nearest == number, number]
        if len(of_shape):
            made = [round(FullDecoder.latent_size(side) * PIXELS) for side in (width, height)]
            say(
                f"  {width * PIXELS:.0f}×{height * PIXELS:.0f} pixels ({width * STRIDE}×"
                f"{height * STRIDE} for the encoder): {len(of_shape)} images, "
                f"{of_shape.mean():.1%} cropped on average, {of_shape.max():.1%} at most; "
                f"generate with --width {made[0]} --height {made[1]}"
            )
    mean = lost.min(axis=1).mean()
    say(f"  all: {mean:.1%} cropped on average; without buckets {square:.1%}")
    return shapes
