"""What two experts become: rules, saliency, alignment, compensation, and the words that come out."""
