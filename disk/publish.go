package disk

import "path"

// TmpSuffix ends the name of a file that is being published. One that is found
// after a crash means nothing.
const TmpSuffix = ".tmp"

// Publish replaces the file name by what write puts into an empty one: written
// under another name, synced, renamed, and the directory synced. After a crash
// the old file is there or the new one, whole. After an error of the renaming
// or of the directory either may be; one of write or of the sync leaves the old.
func Publish(fs FS, name string, write func(File) error) error {
	tmp := name + TmpSuffix
	f, err := fs.Open(tmp, Write|Create|Trunc)
	if err != nil {
		return err
	}
	if err = write(f); err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = fs.Rename(tmp, name)
	}
	if err == nil {
		err = fs.SyncDir(path.Dir(name))
	}
	return err
}

// PublishBytes publishes a file with these bytes.
func PublishBytes(fs FS, name string, b []byte) error {
	return Publish(fs, name, func(f File) error {
		_, err := f.WriteAt(b, 0)
		return err
	})
}
