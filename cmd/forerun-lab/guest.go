package main

import (
	"encoding/json"
	"log/slog"
	"os"

	"github.com/spf13/cobra"

	"forerun/lab/guest"
)

func guestCmd(log *slog.Logger) *cobra.Command {
	c := &cobra.Command{Use: "guest", Short: "Guest images"}
	c.AddCommand(&cobra.Command{
		Use:   "build small|large",
		Short: "Build a guest image, or find it in the cache, and describe it",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			im, err := buildGuest(cmd, args[0], log)
			if err != nil {
				return err
			}
			e := json.NewEncoder(os.Stdout)
			e.SetIndent("", "  ")
			return e.Encode(im)
		},
	})
	return c
}

func buildGuest(cmd *cobra.Command, name string, log *slog.Logger) (guest.Image, error) {
	r, err := guest.ByName(name)
	if err != nil {
		return guest.Image{}, err
	}
	cache, err := guest.CacheDir()
	if err != nil {
		return guest.Image{}, err
	}
	return guest.Build(cmd.Context(), cache, r, log)
}
