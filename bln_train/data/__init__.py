"""Images: data sets, folders, drawn shapes, augmentation."""
